//! Times each op at Falcon-7B's shapes: `cargo bench --bench kernels [NAME]`.
//!
//! Cold: a product walks over enough copies of its weights to exceed the L2 three times. An op is queued many times between two
//! events; median of the batches, with the spread between the 10th and the 90th percentile. Bytes and FLOPs are those the op must
//! move and do, and the ceiling is measured in the same run.
#![allow(clippy::unwrap_used, missing_docs)]

#[cfg(not(feature = "cuda"))]
fn main() {
    eprintln!("SKIPPED kernels: this build has no CUDA (feature `cuda`)");
}

#[cfg(feature = "cuda")]
fn main() {
    cuda::main();
}

#[cfg(feature = "cuda")]
mod cuda {
    use peregrine::gpu::ops::{self, *};
    use peregrine::gpu::{DevBuf, Gpu, StepGraph, Stream};
    use peregrine::sampler::Sampling;

    const HIDDEN: usize = 4544;
    const FFN: usize = 18176;
    const HEADS: usize = 71;
    const VOCAB: usize = 65024;
    const CONTEXT: usize = 2048;
    const COPIES: usize = 4; // x 55 MB: more than three times an H200's L2
    const BATCHES: usize = 15;

    struct Bench {
        gpu: Gpu,
        stream: Stream,
        filter: Option<String>,
        ceiling: f64,
    }

    /// What an op must move and do.
    struct Work {
        bytes: f64,
        flop: f64,
    }

    impl Bench {
        /// Median microseconds of one `run`, called `per_batch` times between two events.
        fn time(&self, per_batch: usize, mut run: impl FnMut(usize)) -> (f64, f64, f64) {
            let mut us: Vec<f64> = Vec::new();
            for batch in 0..=BATCHES {
                let start = self.stream.record(true).unwrap();
                (0..per_batch).for_each(&mut run);
                let end = self.stream.record(true).unwrap();
                end.wait().unwrap();
                if batch > 0 {
                    us.push(f64::from(end.milliseconds_since(&start).unwrap()) * 1e3 / per_batch as f64);
                }
            }
            us.sort_by(f64::total_cmp);
            (us[us.len() / 2], us[us.len() / 10], us[us.len() * 9 / 10])
        }

        fn row(&self, name: &str, work: Work, per_batch: usize, run: impl FnMut(usize)) {
            if self.filter.as_ref().is_some_and(|f| !name.contains(f.as_str())) {
                return;
            }
            let (median, low, high) = self.time(per_batch, run);
            let (bandwidth, rate) = (work.bytes / median / 1e6, work.flop / median / 1e6);
            println!(
                "{name:<46} {median:>9.2} us  ({low:.2} - {high:.2})  {bandwidth:>6.2} TB/s {:>5.1} %  {rate:>7.1} TFLOP/s",
                bandwidth / self.ceiling * 100.0
            );
        }
    }

    fn random_u16(stream: &Stream, n: usize) -> DevBuf<u16> {
        let mut state = 1u64;
        let host: Vec<u16> = (0..n)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                // f16 of magnitude 0.5 to 2 with either sign
                ((state >> 48) as u16 & 0x87ff) | 0x3800
            })
            .collect();
        DevBuf::from_host(stream, "random", &host).unwrap()
    }

    fn matrix(stream: &Stream, n: usize, k: usize) -> Int4Matrix {
        let mut w = Int4Matrix::new(stream, n, k, 1, false).unwrap();
        let mut state = 7u64;
        let mut host = vec![0u8; w.units.len()];
        for word in host.chunks_exact_mut(8) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            word.copy_from_slice(&(state ^ (state >> 29)).to_le_bytes());
        }
        // Scales of about 2^-8: an f16 whose exponent is fixed and whose mantissa is random.
        for unit in host.chunks_exact_mut(544) {
            unit[512..].chunks_exact_mut(2).for_each(|s| s[1] = 0x1c | (s[1] & 3));
        }
        w.units.upload(stream, 0, &host).unwrap();
        w
    }

    pub(super) fn main() {
        let gpu = match Gpu::open(0) {
            Ok(gpu) => gpu,
            Err(e) => return eprintln!("SKIPPED kernels: {e}"),
        };
        let stream = gpu.stream().unwrap();
        let filter = std::env::args().skip(1).find(|a| !a.starts_with('-'));
        let mut bench = Bench { gpu, stream, filter, ceiling: 0.0 };
        let blocks = bench.gpu.multiprocessors().unwrap() * 8;
        {
            let data = DevBuf::<u8>::zeros(&bench.stream, "data", 4 << 30).unwrap();
            let mut mix = DevBuf::<u32>::zeros(&bench.stream, "mix", 1).unwrap();
            let (median, _, _) =
                bench.time(2, |_| ops::stream_read(&bench.stream, &data, &mut mix, blocks).unwrap());
            bench.ceiling = data.len() as f64 / median / 1e6;
            println!("{}, read ceiling {:.2} TB/s over 4 GiB", bench.gpu.name(), bench.ceiling);
        }
        products(&bench);
        rows(&bench);
        attention(&bench);
        head_and_sample(&bench);
        match decode_step_blocks(&bench.gpu, false).unwrap() {
            0 => println!("decode_step: not for this GPU"),
            blocks => decode_step(&bench, blocks),
        }
    }

    fn products(b: &Bench) {
        for (name, n, k) in [("qkv_up", HIDDEN + 128 + FFN, HIDDEN), ("down_dense", HIDDEN, FFN + HIDDEN)] {
            let weights: Vec<_> = (0..COPIES).map(|_| matrix(&b.stream, n, k)).collect();
            let slices = ops::slices(k);
            for m in [1, 2, 4, 8, 9, 16, 32, 64, 128, 256, 512, 2048] {
                let x = random_u16(&b.stream, m * k);
                let (mut out, mut wide) =
                    (random_u16(&b.stream, m * (HIDDEN + 128)), random_u16(&b.stream, m * (FFN + HIDDEN)));
                let mut f32_out =
                    DevBuf::<f32>::zeros(&b.stream, "out", slices * m.min(512) * n.min(HIDDEN)).unwrap();
                let mut residual = DevBuf::<f32>::zeros(&b.stream, "x", m * HIDDEN).unwrap();
                let work = || Work { bytes: weights[0].units.bytes() as f64, flop: 2.0 * (m * n * k) as f64 };
                let kernel = match m {
                    _ if m <= GEMV_TOKENS => MatmulKernel::Gemv,
                    _ if m <= BATCH_TOKENS => MatmulKernel::Batch,
                    _ => MatmulKernel::Gemm,
                };
                let mut run = |i: usize, partial: bool| {
                    let output = match (name, partial) {
                        ("qkv_up", _) => MatmulOutput::Split {
                            out: &mut out,
                            gelu_out: &mut wide,
                            gelu_stride: FFN + HIDDEN,
                            split_row: HIDDEN + 128,
                            bias: None,
                        },
                        (_, true) => MatmulOutput::Partials(&mut f32_out),
                        _ => MatmulOutput::Residual { x: &mut residual, bias: None },
                    };
                    let s = if name == "down_dense" && partial { slices } else { 1 };
                    let a = Activations { x: &x, stride: k, tokens: m };
                    ops::gptq_matmul(&b.stream, kernel, &weights[i % COPIES], 0..n, a, s, output).unwrap();
                };
                let per_batch = if m <= BATCH_TOKENS { 32 } else { 8 };
                if m <= 512 {
                    b.row(&format!("{name} {kernel:?} m {m}"), work(), per_batch, |i| run(i, true));
                }
                if m > BATCH_TOKENS && name == "down_dense" || m > 512 {
                    b.row(&format!("{name} {kernel:?} m {m} unsliced"), work(), per_batch, |i| run(i, false));
                }
            }
        }
    }

    fn rows(b: &Bench) {
        let s = &b.stream;
        let norm = Norm {
            weight: DevBuf::zeros(s, "weight", HIDDEN).unwrap(),
            bias: DevBuf::zeros(s, "bias", HIDDEN).unwrap(),
            epsilon: 1e-5,
        };
        for (m, slices) in [(1, 5), (8, 5), (128, 5), (512, 5), (2048, 0)] {
            let mut x = DevBuf::<f32>::zeros(s, "x", m * HIDDEN).unwrap();
            let partials = DevBuf::<f32>::zeros(s, "partials", slices.max(1) * m * HIDDEN).unwrap();
            let mut out = random_u16(s, m * HIDDEN);
            let bytes = ((if slices > 0 { 4 + 4 + 4 * slices } else { 4 }) + 2) * m * HIDDEN;
            b.row(
                &format!("layernorm m {m} slices {slices}"),
                Work { bytes: bytes as f64, flop: 0.0 },
                32,
                |_| {
                    let pending =
                        (slices > 0).then_some(PendingSum { partials: &partials, slices, bias: None });
                    ops::layernorm(s, &norm, &mut x, pending, m, &mut out).unwrap();
                },
            );
        }
    }

    /// The tokens of a call: `each` slot from `position` on.
    fn tokens(s: &Stream, slots: usize, position: usize, each: usize) -> DevBuf<u32> {
        let words = (0..slots).flat_map(|slot| {
            let mut words = step_token_words(&vec![7; each], position, slot).unwrap();
            words.chunks_mut(STEP_TOKEN_WORDS).for_each(|token| token[3] = (slot * each) as u32);
            words
        });
        DevBuf::from_host(s, "tokens", &words.collect::<Vec<_>>()).unwrap()
    }

    fn cache(s: &Stream, slots: usize) -> LayerCache {
        let values = slots * CONTEXT * 64;
        LayerCache { k: random_u16(s, values), v: random_u16(s, values), slots, max_context: CONTEXT }
    }

    fn attention(b: &Bench) {
        let s = &b.stream;
        let table = DevBuf::<f32>::zeros(s, "table", CONTEXT * 64).unwrap();
        let mut scratch = AttnScratch::new(s, HEADS, CONTEXT, STEP_TOKENS).unwrap();
        let stride = FFN + HIDDEN;
        // Keys and values once a slot; a product with each for every query.
        let work = |slots: usize, position: usize, each: usize| Work {
            bytes: (slots * (position + each) * 256) as f64,
            flop: (slots * (0..each).map(|t| position + t + 1).sum::<usize>() * HEADS * 64 * 4) as f64,
        };
        let decode = [
            (1, 0, 1),
            (1, 127, 1),
            (1, 128, 1),
            (1, 1024, 1),
            (1, 2047, 1),
            (1, 128, 8),
            (1, 1024, 8),
            (1, 2040, 8),
        ];
        for (slots, position, each) in
            decode.into_iter().chain([(8, 128, 1), (8, 1024, 1), (8, 2047, 1), (64, 1024, 1)])
        {
            let (words, m) = (tokens(s, slots, position, each), slots * each);
            let (mut cache, qkv) = (cache(s, slots), random_u16(s, m * (HEADS + 2) * 64));
            let mut out = random_u16(s, m * stride);
            let name = format!("attn_decode slots {slots} tokens {m} position {position}");
            b.row(&name, work(slots, position, each), 32, |_| {
                let output = AttnOutput { out: &mut out, first: FFN, stride };
                ops::attn_decode(
                    s,
                    &qkv,
                    &mut cache,
                    &table,
                    StepTokens::list(&words, m),
                    &mut scratch,
                    output,
                )
                .unwrap();
            });
        }
        let mut cache = cache(s, 1);
        for m in [128, 512, 2048] {
            let words = tokens(s, 1, 0, m);
            let mut qkv = random_u16(s, m * (HEADS + 2) * 64);
            let mut out = random_u16(s, m * stride);
            b.row(&format!("attn_prefill tokens {m}"), work(1, 0, m), 8, |_| {
                let output = AttnOutput { out: &mut out, first: FFN, stride };
                ops::attn_prefill(s, &qkv, HEADS, &cache, StepTokens::list(&words, m), output).unwrap();
            });
            let moved = Work { bytes: (m * (HEADS + 2) * 256) as f64, flop: 0.0 };
            b.row(&format!("rope tokens {m}"), moved, 32, |_| {
                ops::rope(s, &mut qkv, HEADS, &mut cache, &table, StepTokens::list(&words, m)).unwrap();
            });
        }
    }

    /// All 32 layers; of the products' weights two sets take turns, which are more than an L2.
    fn decode_step(b: &Bench, blocks: usize) {
        const LAYERS: usize = 32;
        let s = &b.stream;
        let sets = [0, 1].map(|_| (matrix(s, HIDDEN + 128 + FFN, HIDDEN), matrix(s, HIDDEN, FFN + HIDDEN)));
        let embedding = Table { units: random_u16(s, VOCAB * HIDDEN), vocab: VOCAB, hidden: HIDDEN };
        let norm = Norm {
            weight: DevBuf::from_host(s, "weight", &[1.0; HIDDEN]).unwrap(),
            bias: DevBuf::zeros(s, "bias", HIDDEN).unwrap(),
            epsilon: 1e-5,
        };
        let rope_table = DevBuf::<f32>::zeros(s, "table", CONTEXT * 64).unwrap();
        let mut logits = DevBuf::<f32>::zeros(s, "logits", GEMV_TOKENS * VOCAB).unwrap();
        let layer_bytes = sets[0].0.units.bytes() + sets[0].1.units.bytes();
        for (slots, each, position) in
            [(1, 1, 128), (1, 1, 1024), (1, 1, 2047), (1, 8, 128), (1, 8, 1024), (8, 1, 128), (8, 1, 1024)]
        {
            let m = slots * each;
            let mut words = tokens(s, slots, position, each).download(s, 0, m * STEP_TOKEN_WORDS).unwrap();
            words.splice(0..0, [m as u32, 0, 0, 0]);
            words.resize(STEP_FIRST + STEP_TOKENS * STEP_TOKEN_WORDS, 0);
            let step = DevBuf::from_host(s, "step", &words).unwrap();
            let mut caches: Vec<_> = (0..LAYERS).map(|_| cache(s, slots)).collect();
            let shape = DecodeShape {
                hidden: HIDDEN,
                ffn: FFN,
                heads: HEADS,
                vocab: VOCAB,
                slots,
                max_context: CONTEXT,
                has_zeros: false,
                blocks,
            };
            let mut scratch = DecodeScratch::new(&b.gpu, s, shape).unwrap();
            let keys = LAYERS * slots * (position + each) * 256;
            let bytes = (LAYERS as u64 * layer_bytes + embedding.units.bytes() + keys as u64) as f64;
            let weights = LAYERS * HIDDEN * (2 * (FFN + HIDDEN) + 128) + VOCAB * HIDDEN;
            let work = Work { bytes, flop: 2.0 * (m * weights) as f64 };
            b.row(&format!("decode_step slots {slots} tokens {m} position {position}"), work, 8, |_| {
                let layers = caches.iter_mut().enumerate().map(|(i, cache)| {
                    let (qkv_up, down_dense) = &sets[i % 2];
                    DecodeLayer { norm: &norm, qkv_up, down_dense, cache }
                });
                let model = DecodeModel {
                    layers: layers.collect(),
                    embedding: &embedding,
                    head: &embedding,
                    final_norm: &norm,
                    rope_table: &rope_table,
                };
                ops::decode_step(s, model, &step, &mut scratch, &mut logits).unwrap();
            });
        }
    }

    fn head_and_sample(b: &Bench) {
        let s = &b.stream;
        let table = Table { units: random_u16(s, VOCAB * HIDDEN), vocab: VOCAB, hidden: HIDDEN };
        let mut logits = DevBuf::<f32>::zeros(s, "logits", BATCH_TOKENS * VOCAB).unwrap();
        for m in [1, 8, 16, 32, 64] {
            let x = random_u16(s, m * HIDDEN);
            b.row(
                &format!("head m {m}"),
                Work { bytes: table.units.bytes() as f64, flop: 2.0 * (m * VOCAB * HIDDEN) as f64 },
                8,
                |_| {
                    ops::head(s, &table, &x, 0, m, &mut logits, 0).unwrap();
                },
            );
        }
        // A bell of deviation 2.5, as a model's logits are; equal logits would be sampling's worst case.
        let mut state = 3u64;
        let bell: Vec<f32> = (0..VOCAB)
            .map(|_| {
                let mut unit = || {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
                };
                (unit() + unit() + unit() + unit()) * 4.3
            })
            .collect();
        let card =
            Sampling { temperature: 0.7, top_p: 0.95, repetition_penalty: 1.15, ..Sampling::default() };
        let whole = Sampling { temperature: 1.0, top_k: 0, top_p: 0.9, ..Sampling::default() };
        let greedy = Sampling::default();
        let speculating = greedy.clone().speculate(true);
        for (name, slots, rows, sampling) in [
            ("greedy", 1, 1, &greedy),
            ("card: top_k 50 top_p 0.95", 1, 1, &card),
            ("top_p 0.9 of all", 1, 1, &whole),
            ("greedy, 8 rows, drafts", 1, 8, &speculating),
            ("greedy, 8 slots", 8, 8, &greedy),
            ("card, 8 slots", 8, 8, &card),
            ("card, 64 slots", 64, 64, &card),
        ] {
            // Room for all the calls: a slot that is done does nothing.
            let shape = SamplerShape { slots, rows, vocab: VOCAB, max_context: 8192 };
            let mut sampler = SamplerState::new(&b.gpu, s, shape).unwrap();
            let mut logits = DevBuf::<f32>::zeros(s, "logits", rows * VOCAB).unwrap();
            for row in 0..rows {
                logits.upload(s, row * VOCAB, &bell).unwrap();
            }
            let history: Vec<u32> = (0..1000).map(|i| i % 7).collect();
            for slot in 0..slots {
                ops::start(s, &mut sampler, slot, &history).unwrap();
            }
            let sampling = sampling.clone().max_new_tokens(8192);
            let bytes = (rows * VOCAB * 4) as f64;
            // In a graph, as launches from the host take as long as the kernel.
            let mut graph = StepGraph::capture(s, |s| {
                (0..16).try_for_each(|_| ops::sample(s, &mut sampler, &logits, &sampling, &[]))
            })
            .unwrap();
            b.row(&format!("sample {name}"), Work { bytes, flop: 0.0 }, 16, |i| {
                if i == 0 {
                    graph.launch().unwrap();
                }
            });
        }
        let words = tokens(s, 1, 0, 1);
        let mut x = DevBuf::<f32>::zeros(s, "x", HIDDEN).unwrap();
        b.row("embed m 1", Work { bytes: (HIDDEN * 2) as f64, flop: 0.0 }, 32, |_| {
            ops::embed(s, &table, StepTokens::list(&words, 1), &mut x).unwrap();
        });
    }
}

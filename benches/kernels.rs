//! Times each op at Falcon-7B's shapes: `cargo bench --bench kernels [OP]`, where OP is part of an op's name (`gemv`, `decode_step`).
//!
//! The calls and the timing are those of `peregrine lab bench`: cold and warm, medians with the 10th and the 90th percentile, the
//! floor's share of the cold time, and the ceilings measured first. Only here are ops that the lab has no call for: `sample`,
//! `decode_step`, `attn_decode` of several texts; and a layer's products for all sizes of prompts (`products`).
#![allow(missing_docs)]

#[cfg(not(feature = "cuda"))]
fn main() {
    eprintln!("SKIPPED kernels: this build has no CUDA (feature `cuda`)");
}

#[cfg(feature = "cuda")]
fn main() -> std::process::ExitCode {
    let part = std::env::args().skip(1).find(|word| !word.starts_with('-')).unwrap_or_default();
    if let Err(error) = cuda::bench(&part.to_lowercase()) {
        eprintln!("kernels: {error}");
        return std::process::ExitCode::FAILURE;
    }
    std::process::ExitCode::SUCCESS
}

#[cfg(feature = "cuda")]
mod cuda {
    use peregrine::Result;
    use peregrine::gpu::ops::{self, *};
    use peregrine::gpu::{DevBuf, Gpu, StepGraph, Stream};
    use peregrine::lab::kit::{self, G64, Quantised, Random};
    use peregrine::lab::time::{self, Timer, Times};
    use peregrine::lab::{CONTEXT, FFN, HEADS, HIDDEN, LAYERS, VOCAB, calls};
    use peregrine::measure::machine::{self, Ceilings};
    use peregrine::measure::work::Work;
    use peregrine::sampler::Sampling;

    struct Bench<'a> {
        gpu: &'a Gpu,
        stream: &'a Stream,
        timer: Timer<'a>,
        ceilings: Ceilings,
    }

    impl Bench<'_> {
        fn row(&self, label: &str, work: Work, times: &Times) {
            println!("{}", time::row(label, work, times, self.ceilings));
        }
    }

    /// A function that times an op.
    type Own = fn(&mut Bench<'_>) -> Result<()>;
    const OWN: [(&str, Own); 4] = [
        ("attn_decode of several texts", attention),
        ("sample", sample),
        ("decode_step", decode_step),
        ("products of a layer", products),
    ];

    pub(super) fn bench(part: &str) -> Result<()> {
        let wanted = |op: &str| op.contains(part);
        let all = || calls::OPS.iter().map(|op| op.0).chain(OWN.iter().map(|own| own.0));
        if !all().any(wanted) {
            eprintln!(
                "kernels: no op is named like '{part}': there are {}",
                all().collect::<Vec<_>>().join(", ")
            );
            return Ok(());
        }
        let gpu = match Gpu::open(0) {
            Ok(gpu) => gpu,
            Err(error) => {
                eprintln!("SKIPPED kernels: {error}");
                return Ok(());
            }
        };
        let stream = gpu.shared_stream()?;
        let ceilings = machine::ceilings(&gpu, &stream)?;
        println!("{}: at best {ceilings}. {}.\n\n{}", gpu.name(), time::NOTE, time::heading());
        let timer = Timer::new(&gpu, &stream)?;
        let mut bench = Bench { gpu: &gpu, stream: &stream, timer, ceilings };
        for (op, _) in calls::OPS.iter().filter(|op| wanted(op.0)) {
            for call in &mut calls::own_calls(op, &stream, true)? {
                call.reset(&stream)?;
                let times = bench.timer.times(&mut |stream| call.launch(stream))?;
                bench.row(&call.label(), call.work(), &times);
            }
        }
        OWN.iter().filter(|own| wanted(own.0)).try_for_each(|own| own.1(&mut bench))
    }

    /// The words of `each` tokens of every slot, from `position` on.
    fn tokens(slots: usize, position: usize, each: usize) -> Result<Vec<u32>> {
        let mut words = Vec::new();
        for slot in 0..slots {
            let mut own = step_token_words(&vec![7; each], position, slot)?;
            own.chunks_mut(STEP_TOKEN_WORDS).for_each(|token| token[3] = (slot * each) as u32);
            words.extend(own);
        }
        Ok(words)
    }

    /// Full caches of layers.
    fn caches(stream: &Stream, layers: usize, slots: usize) -> Result<Vec<LayerCache>> {
        let rows = Random::new(5).halves(slots * CONTEXT * 64, 1.0);
        let rows = || DevBuf::from_host(stream, "cache", &rows);
        (0..layers).map(|_| Ok(LayerCache { k: rows()?, v: rows()?, slots, max_context: CONTEXT })).collect()
    }

    /// A token of each of several texts.
    fn attention(b: &mut Bench<'_>) -> Result<()> {
        let (s, stride) = (b.stream, FFN + HIDDEN);
        let table = kit::rope_table(s)?;
        let mut scratch = AttnScratch::new(s, HEADS, CONTEXT, STEP_TOKENS)?;
        for (slots, position) in [(8, 128), (8, 1024), (8, CONTEXT - 1), (64, 1024)] {
            let words = DevBuf::from_host(s, "tokens", &tokens(slots, position, 1)?)?;
            let qkv = Random::new(1).halves(slots * (HEADS + 2) * 64, 1.0);
            let qkv = DevBuf::from_host(s, "qkv", &qkv)?;
            let mut cache = caches(s, 1, slots)?.remove(0);
            let mut out = DevBuf::<u16>::zeros(s, "out", slots * stride)?;
            let times = b.timer.times(&mut |s| {
                let (tokens, output) = (
                    StepTokens::list(&words, slots),
                    AttnOutput { out: &mut out, first: FFN, stride, planes: false, awaited: false },
                );
                ops::attn_decode(s, &qkv, &mut cache, &table, tokens, &mut scratch, output)
            })?;
            let seen = slots * (position + 1);
            let moved = 256 * seen + slots * (2 * HEADS + 2) * 128;
            let work = Work { bytes: moved as f64, flop: (seen * 4 * HEADS * 64) as f64 };
            b.row(&format!("attn_decode {slots} texts at {position}"), work, &times);
        }
        Ok(())
    }

    /// `[qkv ; up]` and `[down | dense]`.
    fn products_of_layer(s: &Stream, random: &mut Random) -> Result<(Int4Matrix, Int4Matrix)> {
        let mut matrix = |n: usize, k: usize| {
            let quantised = Quantised::new(random, n, k, G64);
            kit::repack(s, n, k, &[(&quantised, 0, 0)])
        };
        Ok((matrix(HIDDEN + 128 + FFN, HIDDEN)?, matrix(HIDDEN, FFN + HIDDEN)?))
    }

    /// A prompt's two products of a layer, one behind the other, for numbers of tokens of all sizes; two layers' weights take turns, which
    /// are more than an L2. Beside them what a layer may take: 1.35 times what is longer, the weights at 4.70 TB/s or the operations at
    /// 700 TFLOP/s, and 10 us.
    fn products(b: &mut Bench<'_>) -> Result<()> {
        const TOKENS: [usize; 35] = [
            1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 32, 33, 48, 49, 63, 64, 65, 66, 71, 72, 73, 80, 96, 128, 129,
            192, 255, 256, 257, 384, 512, 1000, 1024, 2047, 2048,
        ];
        const PAIRS: usize = 8;
        let (s, wide, qkv) = (b.stream, FFN + HIDDEN, HIDDEN + 128);
        let mut random = Random::new(7);
        let layers = [products_of_layer(s, &mut random)?, products_of_layer(s, &mut random)?];
        let most = TOKENS[TOKENS.len() - 1];
        let normed = DevBuf::from_host(s, "normed", &random.halves(most * HIDDEN, 1.0))?;
        let input = DevBuf::from_host(s, "input", &random.halves(most * wide, 1.0))?;
        let mut out = DevBuf::<u16>::zeros(s, "out", most * qkv)?;
        let mut gelu = DevBuf::<u16>::zeros(s, "gelu", most * wide)?;
        let mut sums = DevBuf::<f32>::zeros(s, "sums", ops::slices(wide) * most * HIDDEN)?;
        println!("{:<44} {:>24} {:>8}", "a layer's products, us", "median (10 - 90 %)", "may take");
        for m in TOKENS {
            let kernel = MatmulKernel::of_prompt(m);
            let mut turn = 0;
            let mut pair = |s: &Stream| {
                turn += 1;
                let (up, down) = &layers[turn % 2];
                let x = |x, stride| Activations { x, stride, tokens: m, planes: false, attention: None };
                let (out, gelu_out) = (&mut out, &mut gelu);
                let split = MatmulOutput::Split {
                    out,
                    gelu_out,
                    gelu_stride: wide,
                    split_row: qkv,
                    planes: false,
                    bias: None,
                    announced: None,
                    next: None,
                };
                ops::gptq_matmul(s, kernel, up, 0..up.n, x(&normed, HIDDEN), 1, split)?;
                let (slices, output) = if kernel == MatmulKernel::Gemm {
                    (1, MatmulOutput::Residual { x: &mut sums, bias: None })
                } else {
                    (ops::slices(wide), MatmulOutput::Partials(&mut sums))
                };
                ops::gptq_matmul(s, kernel, down, 0..down.n, x(&input, wide), slices, output)
            };
            b.timer.batch(&mut pair, PAIRS, false)?;
            let times = (0..time::BATCHES).map(|_| b.timer.batch(&mut pair, PAIRS, false));
            let times = times.collect::<Result<Vec<_>>>()?;
            let bytes = (layers[0].0.units.bytes() + layers[0].1.units.bytes()) as f64;
            let flop = (2 * m * (qkv + FFN + wide) * HIDDEN) as f64;
            let most = 1.35e6 * (bytes / 4.70e12).max(flop / 700e12) + 10.0;
            println!("{:<44} {:>24} {most:>8.1}", format!("{m} tokens by {kernel:?}"), time::spread(&times));
        }
        Ok(())
    }

    /// All 32 layers; of the products' weights two sets take turns, which are more than an L2.
    fn decode_step(b: &mut Bench<'_>) -> Result<()> {
        let s = b.stream;
        let blocks = decode_step_blocks(b.gpu, false)?;
        if blocks == 0 {
            println!("decode_step: not for this GPU");
            return Ok(());
        }
        let mut random = Random::new(7);
        let sets = [products_of_layer(s, &mut random)?, products_of_layer(s, &mut random)?];
        let table = kit::table(s, VOCAB, HIDDEN, true)?.1;
        let on_sides = |set: &(Int4Matrix, Int4Matrix)| -> Result<Option<(OnSides, OnSides)>> {
            Ok(OnSides::matrix(s, &set.0)?.zip(OnSides::matrix(s, &set.1)?))
        };
        let copies = [on_sides(&sets[0])?, on_sides(&sets[1])?];
        let head_copy = OnSides::table(s, &table)?;
        let norm = Norm {
            weight: DevBuf::from_host(s, "weight", &[1.0; HIDDEN])?,
            bias: DevBuf::zeros(s, "bias", HIDDEN)?,
            epsilon: 1e-5,
        };
        let rope_table = kit::rope_table(s)?;
        let mut logits = DevBuf::<f32>::zeros(s, "logits", GEMV_TOKENS * VOCAB)?;
        let layer_bytes = sets[0].0.units.bytes() + sets[0].1.units.bytes();
        for (slots, each, position) in
            [(1, 1, 128), (1, 1, 1024), (1, 1, 2047), (1, 8, 128), (1, 8, 1024), (8, 1, 128), (8, 1, 1024)]
        {
            let m = slots * each;
            let mut words = vec![m as u32, 0, 0, 0];
            words.extend(tokens(slots, position, each)?);
            words.resize(STEP_FIRST + STEP_TOKENS * STEP_TOKEN_WORDS, 0);
            let step = DevBuf::from_host(s, "step", &words)?;
            let mut caches = caches(s, LAYERS, slots)?;
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
            let mut scratch = DecodeScratch::new(b.gpu, s, shape)?;
            let times = b.timer.times(&mut |s| {
                let layers = caches.iter_mut().enumerate().map(|(i, cache)| {
                    let (qkv_up, down_dense) = &sets[i % 2];
                    DecodeLayer { norm: &norm, qkv_up, down_dense, on_sides: copies[i % 2].as_ref(), cache }
                });
                let model = DecodeModel {
                    layers: layers.collect(),
                    embedding: &table,
                    head: &table,
                    head_on_sides: head_copy.as_ref(),
                    final_norm: &norm,
                    rope_table: &rope_table,
                };
                ops::decode_step(s, model, &step, &mut scratch, &mut logits)
            })?;
            let keys = LAYERS * slots * (position + each) * 256;
            let weights = LAYERS * HIDDEN * (2 * (FFN + HIDDEN) + 128) + VOCAB * HIDDEN;
            let bytes = LAYERS as u64 * layer_bytes + table.units.bytes() + keys as u64;
            let work = Work { bytes: bytes as f64, flop: 2.0 * (m * weights) as f64 };
            b.row(&format!("decode_step {slots} texts, {m} tokens at {position}"), work, &times);
        }
        Ok(())
    }

    /// Calls in a graph, as launches from the host take as long as the kernel.
    const SAMPLES: usize = 16;

    fn sample(b: &mut Bench<'_>) -> Result<()> {
        // A bell of deviation 2.5, as a model's logits are; equal logits would be sampling's worst case.
        let bell = Random::new(3).values(VOCAB, 2.5);
        let history: Vec<u32> = (0..1000).map(|i| i % 7).collect();
        let greedy = Sampling::default().max_new_tokens(CONTEXT);
        let card = Sampling { temperature: 0.7, top_p: 0.95, repetition_penalty: 1.15, ..greedy.clone() };
        let whole = Sampling { temperature: 1.0, top_k: 0, top_p: 0.9, ..greedy.clone() };
        let speculating = greedy.clone().speculate(true);
        for (name, slots, rows, sampling) in [
            ("greedy", 1, 1, &greedy),
            ("card: top_k 50 top_p 0.95", 1, 1, &card),
            ("top_p 0.9 of all", 1, 1, &whole),
            ("greedy, 8 rows, drafts", 1, 8, &speculating),
            ("greedy, 8 slots", 8, 8, &greedy),
            ("card, 8 slots", 8, 8, &card),
            ("greedy, 16 slots", 16, 16, &greedy),
            ("greedy, 32 slots", 32, 32, &greedy),
            ("greedy, 64 slots", 64, 64, &greedy),
            ("card, 64 slots", 64, 64, &card),
        ] {
            let shape = SamplerShape { slots, rows, vocab: VOCAB, max_context: CONTEXT };
            let mut sampler = SamplerState::new(b.gpu, b.stream, shape)?;
            let logits = DevBuf::from_host(b.stream, "logits", &bell.repeat(rows))?;
            let mut graph = StepGraph::capture(b.stream, |s| {
                (0..SAMPLES).try_for_each(|_| ops::sample(s, &mut sampler, &logits, sampling, &[]))
            })?;
            let mut times = Times { cold: Vec::new(), warm: Vec::new() };
            for _ in 0..time::BATCHES {
                // Each batch from the same history: a slot whose context is full does nothing. Drafts begin after a few calls.
                (0..slots).try_for_each(|slot| ops::start(b.stream, &mut sampler, slot, &history))?;
                graph.launch()?;
                let warm = b.timer.batch(&mut |_| graph.launch(), 1, false)?;
                times.warm.push(warm / SAMPLES as f64);
                let mut one = |s: &Stream| ops::sample(s, &mut sampler, &logits, sampling, &[]);
                times.cold.push(b.timer.batch(&mut one, 1, true)?);
            }
            let work = Work { bytes: (rows * VOCAB * 4) as f64, flop: 0.0 };
            b.row(&format!("sample {name}"), work, &times);
        }
        Ok(())
    }
}

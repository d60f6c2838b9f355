#!/usr/bin/env python3
"""Compares logits of this engine with Hugging Face transformers on the same dequantised weights.

    # 1. token ids (needs nothing but Python; ids 12 and up, so no special tokens)
    python3 tests/compare_hf.py CHECKPOINT --n-random-ids 2048 --seed 1 --write-ids ids.json
    # 2. our logits, by prefill and token by token
    peregrine logits -m CHECKPOINT --ids ids.json -o prefill.safetensors
    peregrine logits -m CHECKPOINT --ids ids.json --decode -o decode.safetensors
    # 3. the comparison
    python3 tests/compare_hf.py CHECKPOINT --ours prefill.safetensors --ours decode.safetensors --gate --json out.json

CHECKPOINT is a folder in AutoGPTQ's format: one or more .safetensors with `<matrix>.qweight`, `.qzeros`, `.scales`,
`.g_idx` and perhaps `.bias`, 4 bit, any group size, with or without act-order, v1 or v2 zero points; `config.json` in
either of Falcon's dialects (falcon, RefinedWebModel); multi-query attention with one layer norm per block (Falcon-7B).

transformers cannot load such files any more, so they are dequantised here: W = scale * (code - zero), the scale in
float16 as AutoGPTQ loads it, the product exact in float32. FalconForCausalLM then runs the ids twice:

    float32, TF32 off      the reference; everything is measured against it. Its weights are the exact products, as in
                           src/reference.rs, or with --round-weights those rounded to float16.
    float16                the yardstick: how far Hugging Face itself is from the reference at half precision. Its
                           weights are the products rounded once, as AutoGPTQ's are.

Rounding the weights alone moves logits by about a third of the yardstick, so say which reference a figure is against.

and for every file of ours, and for the yardstick, this is printed (and written with --json):

    KL divergence          sum p_ref * (log p_ref - log p), natural logarithm, from float64 log-softmax: mean, worst
    top-1                  share of positions where the largest logit is the reference's
    worst difference       largest |logit - logit_ref|
    relative L2            |logits - logits_ref| / |logits_ref|, all positions together

and again at single positions (--positions; a position is the index, from 0, of the token whose logits follow).
With --gate the exit status is 1 if a file of ours is worse than the yardstick in mean KL or worst difference.
Exit status: 0 fine, 1 gate not met, 2 wrong usage, 4 bad checkpoint or file.

Needs torch, safetensors and transformers (written for 2.11, 0.8, 5.17). Falcon-7B takes 28 GB for the float32 model
and 0.5 GB for each set of 2048 positions; one model is on the device at a time. About a minute on an H200. Runs on
the CPU too (--device cpu), for small models. Checked against the goldens of the small models (transformers 4.38,
weights dequantised by another program): largest logit difference 6e-5.
"""

import argparse
import gc
import json
import random
import sys
from pathlib import Path

FIRST_ORDINARY_ID = 12  # Falcon's ids 0 to 11 are special tokens
BITS = 4
CODES_PER_WORD = 32 // BITS
CHUNK_POSITIONS = 256  # float64 log-softmax of 256 x 65024 takes 133 MB
MATRICES = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")


class BadInput(Exception):
    """A checkpoint or file this script cannot use; the message says which and why."""


# ---------------------------------------------------------------------------------------------- checkpoint


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: {error}") from error


def falcon_shape(folder):
    """The fields of config.json that matter, in the words of transformers' FalconConfig."""
    raw = read_json(folder / "config.json")
    kind = raw.get("model_type")
    if kind not in ("falcon", "RefinedWebModel"):
        raise BadInput(f"{folder / 'config.json'}: model_type {kind!r}, wanted 'falcon' or 'RefinedWebModel'")
    # What a missing key means differs: the RefinedWeb class assumed neither multi_query nor parallel_attn.
    absent = kind == "falcon"
    wanted = {"alibi": False, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True}
    for key, value in wanted.items():
        got = raw.get(key, value if value is False else absent)
        if bool(got) != value:
            raise BadInput(f"{folder / 'config.json'}: {key} is {got}; only Falcon-7B's {value} is compared here")
    if raw.get("rope_scaling"):
        raise BadInput(f"{folder / 'config.json'}: rope_scaling {raw['rope_scaling']} is not supported")

    def first(*keys, default=None):
        found = [raw[key] for key in keys if raw.get(key) is not None]
        if not found and default is None:
            raise BadInput(f"{folder / 'config.json'}: no {' or '.join(keys)}")
        return found[0] if found else default

    hidden = first("hidden_size", "n_embed")
    return {
        "vocab_size": first("vocab_size"),
        "hidden_size": hidden,
        "num_hidden_layers": first("num_hidden_layers", "n_layer"),
        "num_attention_heads": first("num_attention_heads", "n_head"),
        "ffn_hidden_size": first("ffn_hidden_size", default=4 * hidden),
        "layer_norm_epsilon": first("layer_norm_epsilon", default=1e-5),
        "max_position_embeddings": first("max_position_embeddings", default=2048),
        "rope_theta": (raw.get("rope_parameters") or {}).get("rope_theta") or first("rope_theta", default=10000.0),
    }


def quantize_config(folder):
    for name in ("quantize_config.json", "quant_config.json"):
        if (folder / name).exists():
            return read_json(folder / name)
    return read_json(folder / "config.json").get("quantization_config") or {}


class Tensors:
    """The tensors of all .safetensors of a folder, read when asked for."""

    def __init__(self, folder):
        from safetensors import safe_open

        index = sorted(folder.glob("*.safetensors.index.json"))
        if index:
            names = sorted(set(read_json(index[0])["weight_map"].values()))
        else:
            names = sorted(path.name for path in folder.glob("*.safetensors"))
            if len(names) > 1:  # AutoGPTQ's own name wins over copies and conversions beside it
                names = [n for n in names if n.startswith("gptq_model")] or [n for n in names if n == "model.safetensors"]
            if len(names) != 1:
                raise BadInput(f"{folder}: {len(names)} candidate .safetensors files without an index, wanted 1")
        self.folder, self.where = folder, {}
        for name in names:
            try:
                file = safe_open(str(folder / name), framework="pt", device="cpu")
            except Exception as error:  # the library's own type is not exported under a stable name
                raise BadInput(f"{folder / name}: {error}") from error
            self.where.update(dict.fromkeys(file.keys(), file))

    def __contains__(self, name):
        return name in self.where

    def get(self, name, device):
        if name not in self.where:
            raise BadInput(f"{self.folder}: no tensor {name}")
        return self.where[name].get_tensor(name).to(device)


def zero_offset(tensors, quant):
    """What to add to a stored zero point: 1 for v1 files, 0 for gptq_v2.

    Some files carry the wrong label, so a symmetric checkpoint is decided by what it stores: all 7 is v1, all 8 is v2.
    """
    stored = set()
    for name in tensors.where:
        if name.endswith(".qzeros"):
            stored.update(tensors.get(name, "cpu").unique().tolist())
            if len(stored) > 1:
                break
    uniform = {0x77777777: 1, 0x88888888 - (1 << 32): 0}
    if quant.get("sym", True) and len(stored) == 1 and stored <= uniform.keys():
        return uniform[stored.pop()]
    label = quant.get("checkpoint_format") or quant.get("format") or "gptq"
    return 0 if label == "gptq_v2" else 1


def dequantise(tensors, name, offset, device):
    """[N, K] float32 weight, exact, and the bias (None if absent or zero) of one matrix."""
    import torch

    qweight = tensors.get(f"{name}.qweight", device)  # [K / 8, N] int32, lowest nibble = lowest k
    qzeros = tensors.get(f"{name}.qzeros", device)  # [groups, N / 8] int32, lowest nibble = lowest n
    scales = tensors.get(f"{name}.scales", device).half()  # [groups, N]; AutoGPTQ holds them in half precision
    inputs, outputs = qweight.shape[0] * CODES_PER_WORD, qweight.shape[1]
    groups = scales.shape[0]
    if tuple(scales.shape) != (groups, outputs) or tuple(qzeros.shape) != (groups, outputs // CODES_PER_WORD):
        raise BadInput(
            f"{name}: qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)}, scales {list(scales.shape)} "
            f"do not fit together as {BITS}-bit codes"
        )
    if not torch.isfinite(scales).all():
        raise BadInput(f"{name}.scales: not finite in float16")
    shifts = torch.arange(0, 32, BITS, device=device, dtype=torch.int32)
    codes = ((qweight.unsqueeze(1) >> shifts.view(1, -1, 1)) & 15).view(inputs, outputs)
    zeros = ((qzeros.unsqueeze(2) >> shifts) & 15).view(groups, outputs)
    zeros = (zeros + offset) & 15  # masked, as AutoGPTQ's kernels do: a stored -1 is zero point 0
    if f"{name}.g_idx" in tensors:
        group = tensors.get(f"{name}.g_idx", device).long()
    else:
        group = torch.arange(inputs, device=device) // -(-inputs // groups)
    if group.numel() != inputs or int(group.min()) < 0 or int(group.max()) >= groups:
        raise BadInput(f"{name}.g_idx: {group.numel()} values in {int(group.min())}..{int(group.max())}, "
                       f"wanted {inputs} below {groups}")
    # 11 bits of scale times 5 bits of difference are exact in float32.
    weight = scales.float()[group] * (codes - zeros[group]).float()
    bias = tensors.get(f"{name}.bias", device) if f"{name}.bias" in tensors else None
    if bias is not None and not bias.any():
        bias = None  # AutoGPTQ before 0.7.1 wrote zero biases for layers without one
    return weight.t(), bias


# ---------------------------------------------------------------------------------------------- Hugging Face


def build_model(folder, shape, dtype, attention, device, round_weights):
    """FalconForCausalLM with the checkpoint's weights, every one of them assigned (and rounded once, to dtype)."""
    import torch
    from transformers import AutoModelForCausalLM, FalconConfig

    tensors = Tensors(folder)
    quant = quantize_config(folder)
    if quant.get("bits", BITS) != BITS:
        raise BadInput(f"{folder}: {quant['bits']} bits, wanted {BITS}")
    offset = zero_offset(tensors, quant)
    prefix = "transformer." if "transformer.word_embeddings.weight" in tensors else ""
    embedding = tensors.get(f"{prefix}word_embeddings.weight", device)
    # An lm_head that differs from the embedding is used; transformers ties the two otherwise.
    head = tensors.get("lm_head.weight", device) if "lm_head.weight" in tensors else embedding
    tied = head.shape == embedding.shape and bool((head == embedding).all())

    blocks = [f"h.{i}." for i in range(shape["num_hidden_layers"])]
    biased = any(
        f"{prefix}{block}{matrix}.bias" in tensors and bool(tensors.get(f"{prefix}{block}{matrix}.bias", "cpu").any())
        for block in blocks
        for matrix in MATRICES
    )
    fields = {key: value for key, value in shape.items() if key != "rope_theta"}
    config = FalconConfig(
        **fields, alibi=False, new_decoder_architecture=False, multi_query=True, parallel_attn=True, bias=biased,
        tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": float(shape["rope_theta"])},
    )
    # Built under the dtype rather than converted to it: `model.half()` would round the rotary frequencies too.
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()

    unassigned = dict(model.named_parameters())  # a tied head is listed once, as the embedding

    def assign(name, value):
        if name not in unassigned:
            raise BadInput(f"{folder}: transformers' FalconForCausalLM has no parameter {name}")
        parameter = unassigned.pop(name)
        if parameter.shape != value.shape:
            raise BadInput(f"{folder}: {name} is {list(value.shape)}, config.json wants {list(parameter.shape)}")
        parameter.copy_(value)

    with torch.no_grad():
        assign("transformer.word_embeddings.weight", embedding)
        if not tied:
            assign("lm_head.weight", head)
        del embedding, head
        for part in ("weight", "bias"):
            assign(f"transformer.ln_f.{part}", tensors.get(f"{prefix}ln_f.{part}", device))
        for block in blocks:
            for part in ("weight", "bias"):
                name = f"{block}input_layernorm.{part}"
                assign(f"transformer.{name}", tensors.get(prefix + name, device))
            for matrix in MATRICES:
                weight, bias = dequantise(tensors, f"{prefix}{block}{matrix}", offset, device)
                assign(f"transformer.{block}{matrix}.weight", weight.half() if round_weights else weight)
                if biased:
                    name = f"transformer.{block}{matrix}.bias"
                    assign(name, torch.zeros_like(unassigned[name]) if bias is None else bias)
    if unassigned:
        raise BadInput(f"{folder}: nothing for {sorted(unassigned)[0]} and {len(unassigned) - 1} more parameters")
    return model


def hugging_face_logits(folder, shape, ids, dtype, args):
    """[n, vocab] float32 on the device. The model is gone when this returns."""
    import torch

    model = build_model(folder, shape, dtype, args.attention, args.device, args.round_weights)
    with torch.inference_mode():
        logits = model(torch.tensor([ids], device=args.device), use_cache=False).logits[0].float()
    del model
    gc.collect()
    if torch.device(args.device).type == "cuda":
        torch.cuda.empty_cache()
    if not torch.isfinite(logits).all():
        raise BadInput(f"{folder}: Hugging Face's {dtype} logits are not finite; nothing can be compared with them")
    return logits.clone()  # out of inference mode


# ---------------------------------------------------------------------------------------------- comparison


def compare(reference, other):
    """Per position, float64 lists: KL divergence, top-1 agreement (0 or 1), worst difference; and sums of squares."""
    import torch

    kl, top1, worst, square_difference, square_reference = [], [], [], 0.0, 0.0
    for start in range(0, reference.shape[0], CHUNK_POSITIONS):
        ref = reference[start : start + CHUNK_POSITIONS].double()
        got = other[start : start + CHUNK_POSITIONS].double()
        log_ref, log_got = torch.log_softmax(ref, -1), torch.log_softmax(got, -1)
        kl += (log_ref.exp() * (log_ref - log_got)).sum(-1).tolist()
        top1 += (ref.argmax(-1) == got.argmax(-1)).double().tolist()
        worst += (got - ref).abs().amax(-1).tolist()
        square_difference += float((got - ref).square().sum())
        square_reference += float(ref.square().sum())
    n = len(kl)
    at_kl, at_worst = max(range(n), key=kl.__getitem__), max(range(n), key=worst.__getitem__)
    return {
        "mean_kl": sum(kl) / n,
        "max_kl": kl[at_kl],
        "max_kl_position": at_kl,
        "top1_agreement": sum(top1) / n,
        "worst_difference": worst[at_worst],
        "worst_difference_position": at_worst,
        "relative_l2": (square_difference / square_reference) ** 0.5,
        "per_position": {"kl": kl, "top1": top1, "worst_difference": worst},
    }


def load_ours(path):
    """ids (list) and logits [n, vocab] float32 of a file `peregrine logits` wrote."""
    import torch
    from safetensors.torch import load_file

    try:
        file = load_file(path)
        ids, logits = file["ids"], file["logits"]
    except (OSError, KeyError) as error:
        raise BadInput(f"{path}: {error!r}; wanted tensors `ids` and `logits`") from error
    except Exception as error:  # safetensors' own error type
        raise BadInput(f"{path}: {error}") from error
    if logits.dtype != torch.float32 or logits.dim() != 2 or ids.dim() != 1 or ids.shape[0] != logits.shape[0]:
        raise BadInput(f"{path}: ids {list(ids.shape)}, logits {list(logits.shape)} {logits.dtype}, "
                       f"wanted [n] and [n, vocab] float32")
    bad = (~torch.isfinite(logits)).nonzero()
    if len(bad):
        position, token = bad[0].tolist()
        raise BadInput(f"{path}: {len(bad)} logits are not finite, the first at position {position}, id {token}")
    return ids.tolist(), logits


def print_tables(results, positions):
    width = max(len(name) for name in results)
    print(f"\n{'against float32':<{width}} | mean KL  | worst KL (position) |  top-1  | "
          f"worst difference (position) | rel. L2")
    for name, r in results.items():
        print(f"{name:<{width}} | {r['mean_kl']:.2e} | {r['max_kl']:.2e} ({r['max_kl_position']:>4})     | "
              f"{100 * r['top1_agreement']:6.2f}% | {r['worst_difference']:.3e} "
              f"({r['worst_difference_position']:>4})            | {r['relative_l2']:.2e}")
    if positions:
        columns = " | ".join(f"{p:>22}" for p in positions)
        print(f"\n{'at position':<{width}} | {columns} | KL, worst difference, top-1")
    for name, r in results.items() if positions else ():
        at = r["per_position"]
        cells = (
            f"{at['kl'][p]:.2e} {at['worst_difference'][p]:.2e} {'same' if at['top1'][p] else 'else'}"
            for p in positions
        )
        print(f"{name:<{width}} | " + " | ".join(f"{cell:>22}" for cell in cells))


def gate(results, yardstick):
    """Lines that say where a file of ours is worse than the yardstick."""
    return [
        f"{name}: {what} {r[key]:.3e} is larger than the yardstick's {results[yardstick][key]:.3e}"
        for name, r in results.items()
        if name != yardstick
        for key, what in (("mean_kl", "mean KL"), ("worst_difference", "worst difference"))
        if r[key] > results[yardstick][key]
    ]


# ---------------------------------------------------------------------------------------------- command line


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of an AutoGPTQ checkpoint")
    parser.add_argument("--ours", type=Path, action="append", default=[], help="file of `peregrine logits`; repeatable")
    parser.add_argument("--ids", type=Path, help="JSON list of token ids (default: those in the files of --ours)")
    parser.add_argument("--positions", default="0,1,64,65,2047", help="positions to list singly (default %(default)s)")
    parser.add_argument("--attention", choices=("eager", "sdpa"), default="eager", help="transformers' implementation")
    parser.add_argument("--round-weights", action="store_true", help="float16 weights in the float32 reference too")
    parser.add_argument("--device", default="cuda", help="torch device (default %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--gate", action="store_true", help="exit 1 if ours is worse than float16 Hugging Face")
    parser.add_argument("--n-random-ids", type=int, metavar="N", help="make N random ids instead of reading some")
    parser.add_argument("--seed", type=int, default=0, help="of the random ids (default %(default)s)")
    parser.add_argument("--write-ids", type=Path, metavar="FILE", help="write the ids as JSON and stop")
    args = parser.parse_args()
    try:
        args.positions = sorted({int(p) for p in args.positions.split(",") if p.strip()})
    except ValueError:
        parser.error("--positions: wanted numbers separated by commas")
    if min(args.positions, default=0) < 0:
        parser.error("--positions: wanted numbers from 0 up")
    if args.n_random_ids is not None and args.n_random_ids < 1:
        parser.error("--n-random-ids: wanted at least 1")
    if args.n_random_ids is not None and args.ids:
        parser.error("--n-random-ids and --ids exclude each other")
    if not (args.n_random_ids or args.ids or args.ours):
        parser.error("no token ids: give --ours, --ids or --n-random-ids")
    if args.gate and not args.ours:
        parser.error("--gate has nothing to compare without --ours")
    return args


def token_ids(args, shape, ours):
    """The ids to run, the same in every file."""
    vocab = shape["vocab_size"]
    if args.n_random_ids:
        # Specified by Python across versions, unlike numpy's and torch's generators.
        generator = random.Random(args.seed)
        ids = [FIRST_ORDINARY_ID + int(generator.random() * (vocab - FIRST_ORDINARY_ID)) for _ in range(args.n_random_ids)]
    elif args.ids:
        ids = read_json(args.ids)
    else:
        ids = next(iter(ours.values()))[0]
    if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < vocab for i in ids):
        raise BadInput(f"{args.ids or 'ids'}: wanted a JSON list of ids below {vocab}")
    for path, (theirs, logits) in ours.items():
        if theirs != ids:
            raise BadInput(f"{path}: its {len(theirs)} ids are not the {len(ids)} ids to compare on")
        if logits.shape[1] != vocab:
            raise BadInput(f"{path}: {logits.shape[1]} logits a position, the checkpoint has {vocab}")
    return ids


def main():
    args = arguments()
    shape = falcon_shape(args.checkpoint)
    if args.write_ids:
        args.write_ids.write_text(json.dumps(token_ids(args, shape, {})) + "\n")
        return 0
    import torch
    import transformers

    ours = {str(path): load_ours(path) for path in args.ours}
    ids = token_ids(args, shape, ours)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("compare_hf: no usable GPU; --device cpu works for small models", file=sys.stderr)
        return 2

    reference = hugging_face_logits(args.checkpoint, shape, ids, torch.float32, args)
    yardstick = "Hugging Face float16"
    results = {yardstick: compare(reference, hugging_face_logits(args.checkpoint, shape, ids, torch.float16, args))}
    for path, (_, logits) in ours.items():
        results[path] = compare(reference, logits.to(args.device))

    positions = [p for p in args.positions if p < len(ids)]
    device = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else args.device
    print(f"{args.checkpoint}: {len(ids)} positions, transformers {transformers.__version__} ({args.attention}"
          f"{', rounded weights' if args.round_weights else ''}), torch {torch.__version__}, {device}")
    print_tables(results, positions)
    failures = gate(results, yardstick)
    if args.json:
        record = {
            "checkpoint": args.checkpoint.name, "positions": len(ids), "attention": args.attention, "device": device,
            "round_weights": args.round_weights,
            "torch": torch.__version__, "transformers": transformers.__version__,
            "results": results, "worse_than_yardstick": failures,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if args.gate:
        print("\n" + ("\n".join(failures) if failures else "gate: ours is nowhere worse than the yardstick"))
    return 1 if args.gate and failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BadInput as error:
        print(f"compare_hf: {error}", file=sys.stderr)
        sys.exit(4)

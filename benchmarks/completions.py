"""How fast are our sizes against the models that the paper compares with, end to end, one photo at a time?

`python benchmarks/completions.py` makes each model in its full size with random weights (speed does not hang on them),
has it complete the same prefix about the same photos with the same number of new tokens, greedily and with its cache,
and prints latency, tokens/s, peak memory and the ratio to BLIP-base. Each model runs in a process of its own. Photos
are preprocessed to each model's own size (224, or 384 for BLIP and 512 for SmolVLM), that time included.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import numpy as np

PREFIX_TOKENS = 8
NEW_TOKENS = 24
VOCABULARY = 5120
MODELS = ("mini", "base", "large", "blip-base", "git-base", "smolvlm-256m", "kosmos-2")


def ours(preset):
    from nanovlm_hf import NanoVLMConfig, NanoVLMForConditionalGeneration, NanoVLMImageProcessor

    model = NanoVLMForConditionalGeneration(NanoVLMConfig.from_preset(preset, vocab_size=VOCABULARY))
    images, image_token = NanoVLMImageProcessor(), model.config.image_token_id

    def inputs(photo, ids):
        prompt = np.concatenate([[image_token], ids])[None]
        return {"pixel_values": images(photo, return_tensors="pt")["pixel_values"], "input_ids": prompt}

    return model, inputs, [image_token]


def blip_base():
    import transformers

    model = transformers.BlipForConditionalGeneration(
        transformers.BlipConfig(vision_config={"image_size": 384}, text_config={"encoder_hidden_size": 768})
    )
    images = transformers.BlipImageProcessor(size={"height": 384, "width": 384})

    def inputs(photo, ids):
        # `generate` takes the last token of the prompt for [SEP] and drops it.
        prompt = np.concatenate([ids, [0]])[None]
        return {"pixel_values": images(photo, return_tensors="pt")["pixel_values"], "input_ids": prompt}

    return model, inputs, []


def git_base():
    import transformers

    model = transformers.GitForCausalLM(transformers.GitConfig())
    images = transformers.CLIPImageProcessor()

    def inputs(photo, ids):
        return {"pixel_values": images(photo, return_tensors="pt")["pixel_values"], "input_ids": ids[None]}

    return model, inputs, []


def smolvlm_256m():
    import transformers

    text = {"model_type": "llama", "vocab_size": 49280, "hidden_size": 576, "intermediate_size": 1536}
    text |= {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    config = transformers.Idefics3Config(
        text_config=text,
        vision_config=vision | {"image_size": 512, "patch_size": 16},
        scale_factor=4,
        image_token_id=49190,
        tie_word_embeddings=False,
    )
    model = transformers.Idefics3ForConditionalGeneration(config)
    images = transformers.Idefics3ImageProcessor(
        size={"longest_edge": 512}, max_image_size={"longest_edge": 512}, do_image_splitting=False
    )

    def inputs(photo, ids):
        made = images(photo, return_tensors="pt")
        prompt = np.concatenate([np.full(64, config.image_token_id), ids])[None]
        return {"pixel_values": made["pixel_values"], "input_ids": prompt}

    return model, inputs, [config.image_token_id]


def kosmos_2():
    import torch
    import transformers

    model = transformers.Kosmos2ForConditionalGeneration(transformers.Kosmos2Config())
    images = transformers.CLIPImageProcessor()

    def inputs(photo, ids):
        prompt = np.concatenate([np.arange(4, 68), ids])[None]
        mask = torch.zeros(prompt.shape, dtype=torch.bool)
        mask[:, :64] = True
        pixel_values = images(photo, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values, "input_ids": prompt, "image_embeds_position_mask": mask}

    return model, inputs, []


def measure(name: str, photos: int, threads: int) -> None:
    """In a process of its own: prints one line of JSON."""
    import torch
    from PIL import Image

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    makers = {"blip-base": blip_base, "git-base": git_base, "smolvlm-256m": smolvlm_256m, "kosmos-2": kosmos_2}
    model, make_inputs, suppressed = makers[name]() if name in makers else ours(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, 5000, PREFIX_TOKENS)
    settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    settings |= {"suppress_tokens": suppressed} if suppressed else {}
    seconds = []
    for number in range(photos + 1):
        photo = Image.fromarray(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8))
        start = time.perf_counter()
        inputs = {key: torch.as_tensor(value).to(device) for key, value in make_inputs(photo, ids).items()}
        with torch.no_grad():
            tokens = model.generate(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]), **settings)
        if number:  # the first one warms up
            seconds.append(time.perf_counter() - start)
    assert tokens.shape[1] >= NEW_TOKENS
    if device == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**20
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps({"seconds": statistics.median(seconds), "memory": memory, "parameters": parameters}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--photos", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", choices=MODELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return measure(arguments.one, arguments.photos, arguments.threads)
    measured = {}
    for name in arguments.models:
        command = [
            sys.executable,
            __file__,
            "--one",
            name,
            "--photos",
            arguments.photos,
            "--threads",
            arguments.threads,
        ]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            print(f"{name}: {done.stderr.strip().splitlines()[-1]}")
            continue
        measured[name] = json.loads(done.stdout.splitlines()[-1])
    reference = measured.get("blip-base")
    print(f"one photo, {PREFIX_TOKENS} tokens of prefix, {NEW_TOKENS} new ones, float32, {arguments.threads} threads")
    print(f"{'model':<14} {'parameters':>10} {'ms':>8} {'tokens/s':>9} {'MiB':>7}   of BLIP-base's speed")
    for name, one in measured.items():
        ratio = f"{reference['seconds'] / one['seconds']:.1f}x" if reference else "-"
        print(
            f"{name:<14} {one['parameters'] / 1e6:>9.1f}M {1000 * one['seconds']:>8.0f} "
            f"{NEW_TOKENS / one['seconds']:>9.1f} {one['memory']:>7.0f}   {ratio}"
        )
    return None


if __name__ == "__main__":
    main()

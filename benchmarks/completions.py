"""Compare the end-to-end speed of NanoVLM for single images with the models that the paper compares with.

`python benchmarks/completions.py` creates each model in its full size with random weights, which do not affect speed.
All complete the same prefix for the same images with the same number of new tokens, greedily and with cache. It prints
latency, tokens/s, peak memory and the speed relative to BLIP-base. Each model runs in its own process. Times include
preprocessing to the image size of the model (224, 384 for BLIP and 512 for SmolVLM).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import numpy as np

PREFIX_TOKENS = 8
NEW_TOKENS = 24
VOCABULARY = 5120
MODELS = ("mini", "base", "large", "blip-base", "git-base", "smolvlm-256m", "kosmos-2")


def nanovlm(preset):
    from nanovlm_hf import NanoVLMConfig, NanoVLMForConditionalGeneration, NanoVLMImageProcessor

    model = NanoVLMForConditionalGeneration(NanoVLMConfig.from_preset(preset, vocab_size=VOCABULARY))
    image_processor, image_token = NanoVLMImageProcessor(), model.config.image_token_id

    def inputs(image, ids):
        prompt = np.concatenate([[image_token], ids])[None]
        return {"pixel_values": image_processor(image, return_tensors="pt")["pixel_values"], "input_ids": prompt}

    return model, inputs, [image_token]


def blip_base():
    import transformers

    model = transformers.BlipForConditionalGeneration(
        transformers.BlipConfig(vision_config={"image_size": 384}, text_config={"encoder_hidden_size": 768})
    )
    image_processor = transformers.BlipImageProcessor(size={"height": 384, "width": 384})

    def inputs(image, ids):
        # `generate` drops the last token of the prompt, which it expects to be [SEP].
        prompt = np.concatenate([ids, [0]])[None]
        return {"pixel_values": image_processor(image, return_tensors="pt")["pixel_values"], "input_ids": prompt}

    return model, inputs, []


def git_base():
    import transformers

    model = transformers.GitForCausalLM(transformers.GitConfig())
    image_processor = transformers.CLIPImageProcessor()

    def inputs(image, ids):
        return {"pixel_values": image_processor(image, return_tensors="pt")["pixel_values"], "input_ids": ids[None]}

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
    image_processor = transformers.Idefics3ImageProcessor(
        size={"longest_edge": 512}, max_image_size={"longest_edge": 512}, do_image_splitting=False
    )

    def inputs(image, ids):
        made = image_processor(image, return_tensors="pt")
        prompt = np.concatenate([np.full(64, config.image_token_id), ids])[None]
        return {"pixel_values": made["pixel_values"], "input_ids": prompt}

    return model, inputs, [config.image_token_id]


def kosmos_2():
    import torch
    import transformers

    model = transformers.Kosmos2ForConditionalGeneration(transformers.Kosmos2Config())
    image_processor = transformers.CLIPImageProcessor()

    def inputs(image, ids):
        prompt = np.concatenate([np.arange(4, 68), ids])[None]
        mask = torch.zeros(prompt.shape, dtype=torch.bool)
        mask[:, :64] = True
        pixel_values = image_processor(image, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values, "input_ids": prompt, "image_embeds_position_mask": mask}

    return model, inputs, []


def measure(name: str, images: int, threads: int) -> None:
    """Print the measurements of one model as a line of JSON; runs in its own process."""
    import torch
    from PIL import Image

    from nanovlm_hf.devices import default_device, peak_memory_mib

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    makers = {"blip-base": blip_base, "git-base": git_base, "smolvlm-256m": smolvlm_256m, "kosmos-2": kosmos_2}
    model, make_inputs, suppressed = makers[name]() if name in makers else nanovlm(name)
    device = default_device()
    model = model.to(device).eval()
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, 5000, PREFIX_TOKENS)
    settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    settings |= {"suppress_tokens": suppressed} if suppressed else {}
    seconds = []
    for number in range(images + 1):
        image = Image.fromarray(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8))
        start = time.perf_counter()
        inputs = {key: torch.as_tensor(value).to(device) for key, value in make_inputs(image, ids).items()}
        with torch.no_grad():
            tokens = model.generate(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]), **settings)
        if number:  # the first is a warm-up
            seconds.append(time.perf_counter() - start)
    assert tokens.shape[1] >= NEW_TOKENS
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        json.dumps({"seconds": statistics.median(seconds), "memory": peak_memory_mib(device), "parameters": parameters})
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--images", "--photos", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", choices=MODELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return measure(arguments.one, arguments.images, arguments.threads)
    measured = {}
    for name in arguments.models:
        command = [
            sys.executable,
            __file__,
            "--one",
            name,
            "--images",
            arguments.images,
            "--threads",
            arguments.threads,
        ]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            print(f"{name}: {done.stderr.strip().splitlines()[-1]}")
            continue
        measured[name] = json.loads(done.stdout.splitlines()[-1])
    reference = measured.get("blip-base")
    print(f"one image, {PREFIX_TOKENS} prefix tokens, {NEW_TOKENS} new tokens, float32, {arguments.threads} threads")
    print(f"{'model':<14} {'parameters':>10} {'ms':>8} {'tokens/s':>9} {'MiB':>7}   speed relative to BLIP-base")
    for name, one in measured.items():
        ratio = f"{reference['seconds'] / one['seconds']:.1f}x" if reference else "-"
        print(
            f"{name:<14} {one['parameters'] / 1e6:>9.1f}M {1000 * one['seconds']:>8.0f} "
            f"{NEW_TOKENS / one['seconds']:>9.1f} {one['memory']:>7.0f}   {ratio}"
        )
    return None


if __name__ == "__main__":
    main()

"""Train NanoVLM models: `accelerate launch -m nanovlm_hf.training --config mini_short --dataset data`."""

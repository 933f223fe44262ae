"""Templates of model cards and dataset cards; the wheel carries them as `nanovlm_hf.hub_cards`."""

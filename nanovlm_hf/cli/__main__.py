"""`python -m nanovlm_hf.cli`: the same as `nanovlm`."""

from . import main

if __name__ == "__main__":
    main()

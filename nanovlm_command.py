"""Entry point of the `nanovlm` command.

Importing `nanovlm_hf` registers its classes with the Auto classes of Transformers, which imports PyTorch. The command
needs no Auto class, and `nanovlm_hf` skips the registration if this module is imported.
"""


def main() -> None:
    """Run the command."""
    from nanovlm_hf import cli

    cli.main()

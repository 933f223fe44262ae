"""Options that keep an evaluation short."""

QUICK = ("--split", "validation", "--limit", 3, "--max-new-tokens", 4)

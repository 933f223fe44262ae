"""Export of checkpoints to other runtimes (beyond the paper)."""

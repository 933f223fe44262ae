"""From photos, captions and descriptions to ShortDesc and LongDesc (section 2.1 of the paper)."""

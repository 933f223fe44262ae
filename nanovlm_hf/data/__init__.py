"""Data: from images, captions and descriptions to ShortDesc and LongDesc (section 2.1)."""

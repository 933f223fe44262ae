"""Judging models: completions, a chat model's grades, originality, grounding, coherence, people, and the report."""

"""Evaluation: completions, LLM judge, human ratings, originality, grounding, objects, coherence, and the report."""

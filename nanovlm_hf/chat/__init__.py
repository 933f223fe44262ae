"""Asking a chat model through an OpenAI-compatible endpoint: every reply is paid for once and kept."""

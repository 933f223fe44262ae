"""The demo: a Gradio Space, which `nanovlm demo` starts on one's own machine."""

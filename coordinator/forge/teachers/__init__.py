"""Who teaches: one interface over GGUF files, transformers models, OpenAI-compatible servers and plain commands."""

"""What weight files say of themselves: safetensors and GGUF headers, on disk or on the Hub."""

"""Text to tensors: examples from files, templates, tokenised batches and a preview of what will be trained."""

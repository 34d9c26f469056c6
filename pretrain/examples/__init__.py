"""Tables of examples to fine-tune on, and the stream of them."""

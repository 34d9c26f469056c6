"""Text to token ids and back: SentencePiece and Hugging Face's tokenizers behind one interface, and chats."""

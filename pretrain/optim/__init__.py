"""What updates the weights: AdamW, Muon, and the learning rate over the steps."""

"""What a run says of itself: the journal, events, the console, W&B, curves and the HTML page."""

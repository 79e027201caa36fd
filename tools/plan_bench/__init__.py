"""What plan predicts, measured."""

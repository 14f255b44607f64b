"""What trained models can do: loss on held-out text, multiple-choice tasks, and text of their own."""

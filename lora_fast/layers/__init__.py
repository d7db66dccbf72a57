"""The layers that go into a model."""

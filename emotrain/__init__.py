"""emotrain: LoRA training for text-to-image models with the emo optimizers, LR 1.0 and an automatic stop."""

__version__ = "0.2.0"

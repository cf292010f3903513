"""Training on several machines: PowerSGD between them, ZeRO inside each, launch and topology."""

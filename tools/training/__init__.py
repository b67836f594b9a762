"""What the commands that train share: labelled and unlabelled clips, the trainer, and the model card."""

# Our control for dnp.py: its norms without its output vectors; in attention this is QK-norm without γ. The LM head has
# no norm here: without a vector after it, the logits' size would be fixed at 1.
placement = "norm"

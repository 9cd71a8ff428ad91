# Our control for dnp.py: its norms without its scale vectors. In attention this is QK-norm, known to help by itself.
placement = "norm"

# Our control for unified: the norms of DNP without their scale vectors.
heterogeneous = True
placement = "norm"
reparam = "or"
scale_decay = "input"

# Our control for unified: the norms of DNP without their output vectors (and no norm at the LM head).
heterogeneous = True
placement = "norm"
reparam = "or"
scale_decay = "input"

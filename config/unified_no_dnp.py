# unified without DNP.
heterogeneous = True
reparam = "or"
scale_decay = "input"

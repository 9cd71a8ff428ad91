# unified without HG.
placement = "dual_norm"
reparam = "or"
scale_decay = "input"

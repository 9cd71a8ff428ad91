# unified without OR.
heterogeneous = True
placement = "dual_norm"
scale_decay = "input"

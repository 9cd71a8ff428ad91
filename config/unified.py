# The paper's unified strategy: HG + DNP + OR + IWD.
heterogeneous = True
placement = "dual_norm"
reparam = "or"
scale_decay = "input"

# The paper's unified strategy: HG + DNP + OR + IWD. Where DNP acts, and that decay spares OR's α, is our reconstruction.
heterogeneous = True
placement = "dual_norm"
reparam = "or"
scale_decay = "input"

# The paper's unified strategy: HG + DNP + OR + IWD. Where DNP acts, and that decay spares OR's α, is reconstructed.
heterogeneous = True
placement = "dual_norm"
reparam = "or"
scale_decay = "input"

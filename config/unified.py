# The paper's unified strategy: HG + DNP + OR + IWD. OR's formula and where DNP acts are our reconstruction.
heterogeneous = True
placement = "dual_norm"
reparam = "or"
scale_decay = "input"

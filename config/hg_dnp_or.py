# Third step of the build-up to unified, HG + DNP + OR; also unified without IWD, for leave-one-out.
heterogeneous = True
placement = "dual_norm"
reparam = "or"

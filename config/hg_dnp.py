# Second step of the build-up to unified: HG + DNP.
heterogeneous = True
placement = "dual_norm"

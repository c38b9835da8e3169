"""Any known xLSTM checkpoint to any other format: `python -m convert`, or `xlstm-convert` where it is installed."""

"""Trained networks in formats that others read: a model folder for timm, a program of torch.export, an ONNX graph."""

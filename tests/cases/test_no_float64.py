"""Apple GPUs and other devices without float64: every reading is there, to the accuracy of float32."""

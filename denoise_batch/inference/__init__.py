"""The main job: plan → units → Ray actors → receipts → one rename. Start reading at `infer`."""

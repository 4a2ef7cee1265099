"""The mesh as users write it: types, YAML, validation, conflicts, the MeshSlice format; the sources that deliver it."""

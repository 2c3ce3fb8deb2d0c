"""Operations of the mesh itself."""

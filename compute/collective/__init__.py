"""Operations of a group of peers: agreed memberships, and results that all survivors have or none."""

//! `peili pull`: fetches an image into an OCI image layout as containerd would.

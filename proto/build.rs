//! Compiles the .proto files with protox, so that no system protoc is needed.

use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = Path::new("proto");
    let files = ["types", "command", "session", "node"]
        .map(|name| root.join("heliofs/v1").join(name).with_extension("proto"));
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(&files, [root])?;
    tonic_prost_build::configure()
        // Names and data are `Bytes`: decoding a frame does not copy them.
        .bytes(".")
        .compile_fds(descriptors)?;
    Ok(())
}

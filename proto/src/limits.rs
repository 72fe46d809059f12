//! Bounds that clients and servers of one wire version share.

/// The wire version of this build; a server refuses another one with a message that names both.
pub const WIRE_VERSION: u32 = 1;

/// Longest name of a directory entry, bytes. Source: NAME_MAX, limits.h.
pub const NAME_BYTES_MAX: usize = 255;

/// Longest symlink target, bytes. Source: PATH_MAX - 1, limits.h.
pub const SYMLINK_BYTES_MAX: usize = 4095;

/// Longest name of an extended attribute, bytes. Source: XATTR_NAME_MAX, limits.h.
pub const XATTR_NAME_BYTES_MAX: usize = 255;

/// Longest value of an extended attribute, bytes. Source: XATTR_SIZE_MAX, limits.h.
pub const XATTR_VALUE_BYTES_MAX: usize = 65536;

/// Sum of the lengths of an inode's attribute names with their terminators. Source: XATTR_LIST_MAX, limits.h.
pub const XATTR_LIST_BYTES_MAX: usize = 65536;

/// Most names of one inode: what a signed 16-bit count, the smallest st_nlink in use, can hold with room to spare.
pub const LINKS_MAX: u32 = 65000;

/// A file this small may live in the metadata itself.
pub const INLINE_BYTES_MAX: usize = 4096;

/// Longest file: what loff_t can address.
pub const FILE_BYTES_MAX: u64 = i64::MAX as u64;

/// Largest decoded frame: offsets inside it are 32 bits, and a reader may have to hold one.
pub const FRAME_BYTES_MAX: u64 = 64 << 20;

/// Mutations of one session whose replies are not acknowledged; more wait in the client. Bounds the reply cache, and with it
/// the command that ends a session (§3.3: a command changes at most 1,000 records).
pub const IN_FLIGHT_MAX: usize = 256;

/// Extents in one commit: each may split two neighbours and touches two segment records, so that a commit stays within 1,000
/// records.
pub const COMMIT_EXTENTS_MAX: usize = 96;

/// Files in one commit. 96 files whose extents each cut two others in segments of their own change about 960 records.
pub const COMMIT_FILES_MAX: usize = 96;

/// Segment ids are given to sessions in aligned blocks of this many, so that the owner of an id is one lookup away.
pub const SEGMENTS_PER_BLOCK: u64 = 256;

/// Segment ids that one SegmentsAllocate may ask for.
pub const SEGMENTS_ALLOCATE_MAX: u32 = 4096;

/// Largest gRPC message, bytes: a full page of a directory with attributes, or a batch of log entries.
pub const MESSAGE_BYTES_MAX: usize = 16 << 20;

//! Reading and writing record bytes: fixed-width little endian, LEB128 varints, zigzag for signed numbers.
//!
//! The stored bytes are the canonical encoding that the digest sums, so there is exactly one encoding of a value; a record that
//! changes its form does so under a logged change of the core level.

use bytes::{BufMut, Bytes, BytesMut};

use crate::change::Corruption;

/// Appends values to a record.
#[derive(Debug, Default)]
pub struct Writer(BytesMut);

impl Writer {
    /// A record that opens with its version.
    pub fn record(version: u8) -> Self {
        let mut bytes = BytesMut::with_capacity(96);
        bytes.put_u8(version);
        Self(bytes)
    }

    /// One byte.
    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.0.put_u8(value);
        self
    }

    /// An unsigned varint, 1–10 bytes.
    pub fn varint(&mut self, mut value: u64) -> &mut Self {
        while value >= 0x80 {
            self.0.put_u8(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.put_u8(value as u8);
        self
    }

    /// A signed 64-bit number, 8 bytes.
    pub fn i64(&mut self, value: i64) -> &mut Self {
        self.0.put_i64_le(value);
        self
    }

    /// A 32-bit number, 4 bytes.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.0.put_u32_le(value);
        self
    }

    /// Bytes up to the end of the record.
    pub fn rest(&mut self, value: &[u8]) -> &mut Self {
        self.0.put_slice(value);
        self
    }

    /// The record.
    pub fn finish(self) -> Bytes {
        self.0.freeze()
    }
}

/// Takes values off a record; every error names the record's key.
#[derive(Debug)]
pub struct Reader<'a> {
    key: &'a [u8],
    value: Bytes,
}

impl<'a> Reader<'a> {
    /// Opens the record under `key`; its version must be `version`.
    pub fn record(key: &'a [u8], value: &Bytes, version: u8) -> Result<Self, Corruption> {
        let mut reader = Self {
            key,
            value: value.clone(),
        };
        match reader.u8()? {
            found if found == version => Ok(reader),
            _ => Err(reader.corrupt("unknown version")),
        }
    }

    /// Opens the record under `key`, whose version may be any of 1..=`newest`; which it is.
    pub fn record_up_to(
        key: &'a [u8],
        value: &Bytes,
        newest: u8,
    ) -> Result<(u8, Self), Corruption> {
        let mut reader = Self {
            key,
            value: value.clone(),
        };
        match reader.u8()? {
            found if (1..=newest).contains(&found) => Ok((found, reader)),
            _ => Err(reader.corrupt("unknown version")),
        }
    }

    /// The error for this record.
    pub fn corrupt(&self, why: &'static str) -> Corruption {
        Corruption::Record {
            key: self.key.to_vec(),
            why,
        }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], Corruption> {
        let bytes = self
            .value
            .first_chunk::<N>()
            .copied()
            .ok_or_else(|| self.corrupt("too short"))?;
        self.value = self.value.slice(N..);
        Ok(bytes)
    }

    /// One byte.
    pub fn u8(&mut self) -> Result<u8, Corruption> {
        self.take::<1>().map(|[byte]| byte)
    }

    /// An unsigned varint.
    pub fn varint(&mut self) -> Result<u64, Corruption> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8()?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                return Err(self.corrupt("varint overflows"));
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(self.corrupt("varint is too long"))
    }

    /// A varint that must fit 32 bits.
    pub fn varint32(&mut self) -> Result<u32, Corruption> {
        self.varint()?
            .try_into()
            .map_err(|_| self.corrupt("number does not fit 32 bits"))
    }

    /// A signed 64-bit number.
    pub fn i64(&mut self) -> Result<i64, Corruption> {
        self.take().map(i64::from_le_bytes)
    }

    /// A 32-bit number.
    pub fn u32(&mut self) -> Result<u32, Corruption> {
        self.take().map(u32::from_le_bytes)
    }

    /// Everything up to the end of the record, without a copy.
    pub fn rest(&mut self) -> Bytes {
        std::mem::take(&mut self.value)
    }

    /// Checks that nothing is left.
    pub fn end(self) -> Result<(), Corruption> {
        if self.value.is_empty() {
            Ok(())
        } else {
            Err(self.corrupt("bytes left over"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_reads_back() {
        for value in [0, 1, 127, 128, 300, u64::from(u32::MAX), u64::MAX] {
            let mut writer = Writer::record(1);
            writer.varint(value).i64(-5).u32(7).rest(b"tail");
            let bytes = writer.finish();
            let mut reader = Reader::record(b"k", &bytes, 1).unwrap();
            assert_eq!(reader.varint(), Ok(value));
            assert_eq!(reader.i64(), Ok(-5));
            assert_eq!(reader.u32(), Ok(7));
            assert_eq!(reader.rest(), "tail");
            reader.end().unwrap();
        }
    }

    #[test]
    fn damage_is_an_error_that_names_the_key() {
        let too_long = Bytes::from_static(&[
            1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f,
        ]);
        let error = Reader::record(b"k", &too_long, 1)
            .unwrap()
            .varint()
            .unwrap_err();
        assert!(matches!(error, Corruption::Record { key, .. } if key == b"k"));
        assert!(Reader::record(b"k", &Bytes::from_static(&[2]), 1).is_err());
        assert!(Reader::record(b"k", &Bytes::new(), 1).is_err());
    }
}

"""Makes a bucket and an account that may use it, on a fresh server of moto, and prints the account for a shell.

See with-moto.sh, which calls it.
"""

import json
import os

import boto3

ALL = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}

session = boto3.Session(aws_access_key_id="none", aws_secret_access_key="none", region_name=os.environ["AWS_REGION"])


def client(service):
    return session.client(service, endpoint_url=os.environ["VMEM_S3_ENDPOINT"])


client("s3").create_bucket(Bucket=os.environ["VMEM_S3_BUCKET"])
iam = client("iam")
iam.create_user(UserName="tests")
iam.put_user_policy(UserName="tests", PolicyName="all", PolicyDocument=json.dumps(ALL))
key = iam.create_access_key(UserName="tests")["AccessKey"]
print(f"export AWS_ACCESS_KEY_ID={key['AccessKeyId']}")
print(f"export AWS_SECRET_ACCESS_KEY={key['SecretAccessKey']}")
